"""What the program needs and a reader of the method may skip: books, machine, report, pictures."""
