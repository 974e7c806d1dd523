"""What the monitors watch on any model: heads, residual branches, attentions and routers, from the reading that plans use."""
