"""Description of a data set: what its files hold, what is done about it, what is suspicious."""
