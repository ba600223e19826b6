"""The search: what every choice costs, what it harms, and the plans that trade one for the other."""
