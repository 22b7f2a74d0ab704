"""How it is measured: every performance or accuracy table in the documents comes from a command here."""
