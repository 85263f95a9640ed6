"""The models of the zoo: how each library's are built, and what they are called with."""
