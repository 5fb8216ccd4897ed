"""The choice of an operation's way: modes, backends, measured choices and their files, private PyTorch APIs."""
