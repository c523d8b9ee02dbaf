"""The atelier's world, second edition: what pictures can show, who likes what, how well a picture suits whom."""
