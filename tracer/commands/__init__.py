"""The subcommands that need a trace or nothing at all."""
