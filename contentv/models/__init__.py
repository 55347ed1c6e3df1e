"""The transformer, the video VAE, the text encoders and the reward models: single-process code for any machine."""
