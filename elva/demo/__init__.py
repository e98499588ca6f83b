"""A page to search by: grains as switches, pictures of one's own; gradio draws and serves it."""
