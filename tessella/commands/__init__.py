"""The commands: one a file, one public function a file, the same from Python as from the command line."""
