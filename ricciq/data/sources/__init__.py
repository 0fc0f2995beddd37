"""The forms that images come in, a module a form."""
