"""The ROS 2 rim; nothing outside this folder imports rclpy."""
