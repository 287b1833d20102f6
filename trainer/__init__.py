"""The trainer: AlexNet as two columns on two devices. `python -m trainer --help`."""
