"""Tasks, the command line, reports and run folders."""
