"""What is made of a recipe: the teacher, its roles, the data, the run folder."""
