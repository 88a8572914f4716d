"""The `hf-vit` command: one file for each subcommand."""
