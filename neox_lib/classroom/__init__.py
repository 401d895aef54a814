"""A class in a room: the edition for students, the report on what they hand in, and a look at their machines."""
