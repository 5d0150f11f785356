"""The command line's subcommands: `python -m fastusp_backend <command>`."""
