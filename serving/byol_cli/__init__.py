"""The `byol` command: the one package that sees both training and serving, each imported lazily."""
