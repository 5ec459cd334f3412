"""The command lines: ``python -m fdda_ext.train`` runs `fdda_ext.commands.train`, and so on."""
