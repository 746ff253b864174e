"""The study of conversations that outgrow the window: what goes, and where the rest stands."""
