"""`datps study`: a grid of runs, each a whole `datps train`, and the table that compares them."""
