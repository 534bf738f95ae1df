"""What pass `offload` decides by: which weights belong to one layer alone, and which layers stay."""
