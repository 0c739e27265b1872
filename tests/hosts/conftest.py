"""Before anything imports the hub client: tests never ask the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
