"""One self-contained page that shows what every pass did to a model."""
