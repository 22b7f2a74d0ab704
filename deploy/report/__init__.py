"""`datps report`: one page about many runs, with the paper's tables beside them."""
