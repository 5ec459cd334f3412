"""The command lines. For example, ``python -m fdda_ext.train`` runs `fdda_ext.commands.train`."""
