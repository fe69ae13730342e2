"""What machines have and how fast it is: memory, rates, and what lies between two of them."""
