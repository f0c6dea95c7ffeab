"""The course's exercises: what learners start from, what is checked, and one solution of each."""
