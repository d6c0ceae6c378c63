"""What all rooms share: errors, files, caches, the console, the device, and the libraries that compute."""
