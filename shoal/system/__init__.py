"""What shoal asks of the operating system: files, locks, devices, helper processes, output."""
