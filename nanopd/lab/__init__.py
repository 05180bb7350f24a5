"""The laboratory: measures a machine, makes workloads, simulates runs and plans arrangements of workers."""
