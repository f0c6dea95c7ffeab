"""A checked command becomes a run: LightningCLI, the Trainer, and what each subcommand does."""
