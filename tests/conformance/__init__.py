"""What others wrote, as referee: their tests and their code, fetched and never copied."""
