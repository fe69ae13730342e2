"""Where: node inventory, planner, Ray placement, controller, links."""
