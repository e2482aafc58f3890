"""What `resmem demo` runs: CIFAR-100, its residual networks, and what ships with the package."""
