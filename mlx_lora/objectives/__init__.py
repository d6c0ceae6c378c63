"""What a run trains toward: for each objective, the records it needs, its loss, and what it reports."""
