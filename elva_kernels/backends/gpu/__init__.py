"""What the GPU backends share: steps and a search that are torch's."""
