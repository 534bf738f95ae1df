"""What was proved about a model and how a failure is run again: explain, report, reproduce."""
