"""Views by way of the network: workers that read and decode for trainers on other machines."""
