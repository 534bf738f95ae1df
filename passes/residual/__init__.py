"""The residual stream: the values that everything between two layers goes through, and leaving there."""
