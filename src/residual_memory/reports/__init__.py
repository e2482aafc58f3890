"""What was measured, as one HTML file for people: `page` writes it, `measured` makes it of an evaluation."""
