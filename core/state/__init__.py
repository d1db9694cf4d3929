"""What a run leaves behind: checkpoints and the files of its folder."""
