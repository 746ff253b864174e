"""One job from input file to sealed folder: the stages between the rooms. No terminal, no flags."""
