"""What an artifact costs and what it is worth: latency, throughput, memory, cold start, accuracy; reports."""
