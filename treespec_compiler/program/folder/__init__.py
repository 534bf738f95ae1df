"""Programs compiled ahead of time: a folder of plain data that runs without the model's code."""
