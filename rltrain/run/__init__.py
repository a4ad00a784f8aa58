"""What a run is: the ground floor that every program of the project stands on. Standard library only."""
