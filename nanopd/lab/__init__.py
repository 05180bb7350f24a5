"""What is measured and simulated: profile, simulation, plan, workloads."""
