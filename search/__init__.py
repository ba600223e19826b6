"""The search: what every choice costs, what it harms, and the plans between the two."""
