"""Where the images of an audit, a training or an evaluation come from: one file for each input format."""
