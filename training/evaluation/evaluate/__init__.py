"""What each part of the method brings: methods, controls and ablations side by side."""
