"""Documents at any position: adapters, how they are trained, and the study of all modes."""
