"""Shows users what the model sees: records in the terminal and in HTML, a decode while it runs, and plots of training."""
